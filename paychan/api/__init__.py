"""The HTTP interfaces: thin parsers in front of the actors."""
