"""The operator's application, which the server asks about every payment if a callback is configured."""
