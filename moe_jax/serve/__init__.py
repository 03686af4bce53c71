"""Generate from a trained model."""
