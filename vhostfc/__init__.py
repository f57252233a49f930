"""vhostfc: a Fibre Channel host bus adapter for a virtual machine, in userspace."""

__version__ = "0.1.0"
