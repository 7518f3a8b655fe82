"""What comes back from the field: the contract of its files, reading them safely, and playing the field."""
