"""The same client without a single mod: whoever writes the app may always ship this one."""

from __future__ import annotations

from flwr.clientapp import ClientApp

from brain.client_app import on_train

app = ClientApp()
app.train()(on_train)
