"""One running machine: process, sockets, TLS, journal, engine, HTTP API, command line."""
