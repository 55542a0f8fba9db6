"""What commands share: options, data, networks, devices, evaluation, files and pictures."""
