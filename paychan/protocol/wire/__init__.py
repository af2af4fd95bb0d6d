"""Encodings: requests and results of RBPCP, frames of the payment stream, messages of the signer, BIP70."""
