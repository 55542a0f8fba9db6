"""Memory passes over a feature volume in eager mode, one module for each kind of device."""
