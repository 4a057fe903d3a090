"""Settings that hold for every test."""

from hypothesis import HealthCheck, settings

# Times are never asserted: a shared core must not fail a property.
settings.register_profile("dualpath", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dualpath")
