"""What the extension module offers; the declarations are those of native/vhostfc.h and native/frontend.h."""

from typing import Any

ffi: Any

class _Lib:
    VFC_CDB_MAX: int
    VFC_SENSE_MAX: int
    VFC_CONTROL_MAX: int
    VFC_MAX_RINGS: int
    VFC_LATCH_BYTES: int
    VFC_LATCH_WORDS: int
    VFC_LATCH_STRIPE: int
    VFC_ENGINE_NO_URING: int
    VFC_ROUTE_GONE: int
    VFC_ROUTE_READ_ONLY: int
    VFC_MATCH_TAG: int
    VFC_MATCH_LUN: int
    VFC_MATCH_TARGET: int
    VFC_MATCH_HELD: int
    VFC_MEDIUM_MEMORY: int
    VFC_MEDIUM_FILE: int
    VFC_MEDIUM_DIRECT: int
    VFC_MEDIUM_NULL: int
    VFC_MSG_PING: int
    VFC_MSG_MEM: int
    VFC_MSG_RING_START: int
    VFC_MSG_RING_ENABLE: int
    VFC_MSG_RING_CALL: int
    VFC_MSG_RING_ERR: int
    VFC_MSG_RING_STOP: int
    VFC_MSG_TARGET: int
    VFC_MSG_ROUTE: int
    VFC_MSG_ABORT: int
    VFC_MSG_QUERY: int
    VFC_MSG_EVENT: int
    VFC_MSG_RESET: int
    VFC_MSG_RING_MOVE: int
    VFC_RING_CONTROL: int
    VFC_RING_EVENT: int
    VFC_RING_REQUEST: int
    VFC_FINISH: int
    VFC_ABORT_RESET: int
    VFC_ABORT_ABORTED: int
    VFC_EVENT_ACK: int
    VFC_EVENT_PUNT: int
    VFC_EVENT_CONTROL: int
    VFC_EVENT_BUFFERS: int
    VFC_EVENT_BROKEN: int
    VFC_EVENT_LATCH: int
    VFC_EVENT_BUSY: int
    VFC_WHY_OPCODE: int
    VFC_WHY_NO_ROUTE: int
    VFC_WHY_ATTRIBUTE: int
    VFC_WHY_FIELD: int
    VFC_WHY_RANGE: int
    VFC_WHY_TRANSFER: int
    VFC_WHY_MEDIUM: int
    VFC_WHY_DOUBT: int
    VFD_EVENT_IDX: int
    VFD_INDIRECT: int
    VFD_RANDOM: int
    VFD_POLL: int
    VFD_VERIFY: int
    VFD_SHARED: int
    VFD_NO_RETRY: int
    VFD_FUA: int
    VFD_STOP: int
    VFD_STOP_NOW: int
    VFD_BUCKETS: int
    VFD_OK: int
    VFD_BAD_USED: int
    VFD_BAD_LENGTH: int
    VFD_BAD_RESPONSE: int
    VFD_BAD_STATUS: int
    VFD_BAD_RESIDUAL: int
    VFD_TORN: int
    VFD_MISPLACED: int
    VFD_STALE: int
    VFD_FUTURE: int
    VFD_KINDS: int
    def vfc_map_new(self, fd: int, gpa: int, size: int, uaddr: int, offset: int, ret_map: Any) -> int: ...
    def vfc_map_put(self, region: Any) -> None: ...
    def vfc_mem_new(self, maps: Any, n: int, ret_mem: Any) -> int: ...
    def vfc_mem_put(self, mem: Any) -> None: ...
    def vfc_mem_covers(self, mem: Any, uaddr: int, size: int) -> int: ...
    def vfc_latch_open(self, fd: int, ret_latch: Any) -> int: ...
    def vfc_latch_put(self, latch: Any) -> None: ...
    def vfc_latch_take(self, latch: Any, owner: int, offset: int, length: int, ret_holder: Any) -> int: ...
    def vfc_latch_free(self, latch: Any, owner: int, offset: int, length: int) -> None: ...
    def vfc_latch_redo(self, latch: Any, owner: int, fd: int) -> int: ...
    def vfc_latch_recover(self, latch: Any, owner: int) -> int: ...
    def vfc_latch_losses(self, latch: Any) -> int: ...
    def vfc_latch_lost(self, latch: Any, known: int) -> int: ...
    def vfc_medium_new(self, setup: Any, ret_medium: Any) -> int: ...
    def vfc_medium_put(self, medium: Any) -> None: ...
    def vfc_engine_new(self, setup: Any, ret_engine: Any) -> int: ...
    def vfc_engine_free(self, engine: Any, grace_ms: int) -> int: ...
    def vfc_fd(self, engine: Any, worker: int) -> int: ...
    def vfc_pin(self, engine: Any, worker: int, cpu: int) -> int: ...
    def vfc_uses_uring(self, engine: Any) -> int: ...
    def vfc_post(self, engine: Any, worker: int, msg: Any) -> int: ...
    def vfc_next(self, engine: Any, worker: int, ret_event: Any) -> int: ...
    def vfc_reply(self, engine: Any, answer: Any) -> int: ...
    def vfc_reply_control(self, engine: Any, handle: int, answer: Any, length: int) -> int: ...
    def vfc_stats(self, engine: Any, worker: int, ret_stats: Any) -> int: ...
    def vfc_work(self, engine: Any, worker: int, ret_work: Any) -> int: ...
    def vfd_fence(self) -> None: ...
    def vfd_table_new(self, first: int, blocks: int, ret_table: Any) -> int: ...
    def vfd_table_free(self, table: Any) -> None: ...
    def vfd_arena_size(self, job: Any, ring_flags: int) -> int: ...
    def vfd_max_depth(self, job: Any, ring_size: int, ring_flags: int) -> int: ...
    def vfd_bucket_floor(self, bucket: int) -> int: ...
    def vfd_run(self, ring: Any, job: Any, ret_result: Any) -> int: ...

lib: _Lib
