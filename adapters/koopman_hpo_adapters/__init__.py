"""Thin adapters: each translates one framework into `koopman_hpo.Problem` or an `Inner`."""
