"""Devices and processes: the mesh, where arrays lie on it, several hosts, memory."""
