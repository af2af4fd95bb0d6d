"""The HTTP doors: thin parsers in front of the actors."""
