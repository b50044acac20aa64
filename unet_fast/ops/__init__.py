"""The operators: contract, validation, fake kernel and derivative of each native one."""
