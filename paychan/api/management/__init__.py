"""The operator's interface: channels, health, deposits, backups, withdrawals."""
