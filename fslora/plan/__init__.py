"""From a fleet to a plan: which sketch ratio for which class of devices.

The cost of a client's round is counted on the real model, the rounds to a target are fitted to a
few pilot runs in the form that the convergence bound has, and scipy finds the ratios.
"""
