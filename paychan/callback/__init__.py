"""The application that sells something: asked about every payment when the operator wants it."""
