"""Who may speak in this mesh: the CA, tokens, admission, TLS, sealed keys and datagrams, API keys."""
