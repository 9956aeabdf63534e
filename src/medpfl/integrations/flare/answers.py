"""What a site's filters of answers let leave at all."""

from __future__ import annotations

from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply

from medpfl.core.errors import DataError
from medpfl.integrations.flare.exchange import CHANGES, METRICS, WEIGHTS, kind_of, plain, read
from medpfl.integrations.flare.site import SiteFilter, known_kind

CODES = frozenset(value for name, value in vars(ReturnCode).items() if name.isupper())


class AnswerFilter(SiteFilter):
    """Base of filters of answers. An update may carry plain numbers and short words beside its tensors, no arrays.

    An answer with an error code leaves without content: FLARE's own `DXOFilter` hands it on unseen. Metrics of a
    validation leave if they are plain numbers. All else is blocked.
    """

    def checked(self, message: Shareable, fl_ctx: FLContext) -> Shareable | None:
        """Weights or changes of weights to look at."""
        code = message.get_return_code()
        if code != ReturnCode.OK:
            if code not in CODES:
                raise DataError(f"the answer has an unknown return code {str(code)[:60]!r}")
            message.clear()
            message.update(make_reply(code))
            return None
        found = read(message)
        beside = {"the meta": found.meta, "the headers": message["__headers__"]}
        for where, values in beside.items():
            for key, value in (values or {}).items():
                if not plain(value):
                    raise DataError(f"{where} of the answer hold '{key}', which is no plain value")
        if kind_of(found) == METRICS:
            if not plain(found.data):
                raise DataError("the metrics are more than plain numbers")
            return None
        known_kind(found, WEIGHTS, CHANGES)
        return message
