"""What trains trials: one protocol, several engines."""
