"""Ray reads its mode and token when it is imported: they must be in the environment before any test here imports it."""

from tests.actors import conftest as conftest
