"""Schedules: order and waiting, nothing else. Each is readable on one screen."""
