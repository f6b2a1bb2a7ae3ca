"""Width and depth in one plan: channels and whole blocks leave together, under one budget."""

from nni_plugin.width_and_depth.planner import check_jointly, plan_jointly

__all__ = ["check_jointly", "plan_jointly"]
