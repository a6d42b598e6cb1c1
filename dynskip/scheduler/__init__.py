"""Which requests are resident and which of them step together; no model, no device."""
