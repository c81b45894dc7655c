"""Which families of models are served: tiny random models of all of them, what loading them gives, and the table."""
