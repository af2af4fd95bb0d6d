"""Commands of `paychan-signer`."""
