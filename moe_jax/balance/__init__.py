"""Even experts: load seen, predicted and corrected; arrays in, arrays out."""
