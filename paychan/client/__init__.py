"""What a payer's program uses; needs no server code."""
