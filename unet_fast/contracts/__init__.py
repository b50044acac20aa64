"""What each operator takes: constants and checks, for the operator and its reference."""
