"""Tasks that watch clock, chain and signer, and send messages to the actors of the channels concerned."""
