"""Channel coupling of any network, from one run seen operator by operator."""

from nni_plugin.tracing.coupling import coupled_groups, unreached

__all__ = ["coupled_groups", "unreached"]
