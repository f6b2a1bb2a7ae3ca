"""Channel coupling of any network, from one run seen operator by operator."""

from nni_plugin.tracing.coupling import coupled_groups

__all__ = ["coupled_groups"]
