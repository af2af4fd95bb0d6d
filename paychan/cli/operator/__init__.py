"""Commands of the operator: status, channels, backups, settling."""
