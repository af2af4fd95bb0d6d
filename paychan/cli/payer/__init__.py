"""Commands of the payer: `paychan channel`."""
