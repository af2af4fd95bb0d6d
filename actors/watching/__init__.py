"""Tasks that watch the clock, the chain and the signer, and send messages to the actors of the channels concerned."""
