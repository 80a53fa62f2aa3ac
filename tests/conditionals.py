"""The conditionals of a traced program, for tests of what its branches return."""

from jax.extend.core import jaxprs_in_params


def conditionals(jaxpr):
    """The shapes that each conditional of a program returns, in order."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            found.append([out.aval.shape for out in equation.outvars])
        for inner in jaxprs_in_params(equation.params):
            found += conditionals(inner)
    return found
