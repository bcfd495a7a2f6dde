"""Base models: finding, loading, inspecting, generating; and the built-in one."""
