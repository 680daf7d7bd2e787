"""Property-based tests of all public functions: values equal an independent reference, and relations between calls hold."""
