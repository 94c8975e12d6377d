"""What several tests use: small models, scripts for processes, the list of traps."""
