"""Constants and argument checks of each operator, for the operator and its reference."""
