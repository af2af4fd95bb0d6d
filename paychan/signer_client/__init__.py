"""The server's access to the signer: the contract (`base`) and the client of the signer's socket (`unix`)."""
