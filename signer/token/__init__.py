"""Keys in a PKCS#11 token, whose library runs in a separate process."""
