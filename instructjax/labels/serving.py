"""Runs the web application until it is told to stop. Called by the command."""

import socket
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette

from instructjax.core.errors import UserError, reason
from instructjax.labels import account_pages, labeler_pages, playground, researcher_pages, web
from instructjax.labels.schema import Database

TABLES = (account_pages.ROUTES, labeler_pages.ROUTES, researcher_pages.ROUTES, playground.ROUTES)


def make(
  database: Database,
  hosts: list[str],
  is_secure: bool = False,
  play: playground.Playground | None = None,
) -> Starlette:
  """The application with all of its pages; arguments as of `web.Site` and `web.application`."""
  return web.application(web.Site(database, is_secure, play), TABLES, hosts)


def shown(host: str) -> str:
  """An address as it stands in a URL."""
  return f"[{host}]" if ":" in host else host


def run(app: Starlette, host: str, port: int, tell: Callable[[str], None], proxies: str):
  """Answers requests until the process is interrupted.

  Args:
    app: the application.
    host, port: where to listen; port 0 for any that is free.
    tell: called with the address, when it is ready.
    proxies: addresses or networks, separated by commas, of the proxies that name each browser's address, by which
      wrong passwords are counted; '' if browsers ask this process itself.
  Raises:
    UserError: the address cannot be used.
  """
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  try:
    listening = socket.create_server((host, port), family=family)
  except OSError as error:
    raise UserError(f"--host={host} --port={port} cannot be used: {reason(error)}") from error
  config = uvicorn.Config(
    app,
    host=host,
    port=port,
    log_level="warning",
    proxy_headers=bool(proxies),
    forwarded_allow_ips=proxies,
    server_header=False,
  )
  tell(f"http://{shown(host)}:{listening.getsockname()[1]}/")
  uvicorn.Server(config).run(sockets=[listening])
