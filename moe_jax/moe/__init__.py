"""The Mixture-of-Experts layer: routing, dispatch, experts, combine."""
