"""The payment stream over WebSocket."""
