"""A model on many processes and machines."""
