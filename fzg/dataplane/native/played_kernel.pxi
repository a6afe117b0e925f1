"""System calls played by Python objects, so that tests of errors and figures from memory pass through the same code."""

import struct

_CONTROL_HEADER = struct.Struct("@Nii")  # <sys/socket.h> cmsghdr: length, level, type
_CONTROL_ALIGNMENT = struct.calcsize("N")
_UDP_LEVEL, _UDP_SEGMENT_TYPE = 17, 103
_UNEXPECTED = 1  # EPERM: the call fails, and the exception is raised when the engine's turn is over


cdef class PlayedKernel:
    """`calls` answers system calls; what it raises besides OSError waits for `raise_failure`."""

    cdef object calls
    cdef object failure
    cdef int pending

    def __init__(self, calls):
        self.calls = calls

    cpdef raise_failure(self):
        """Raise what a call raised."""
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    cdef int failed(self, error):
        """What a call that raised `error` returns."""
        if isinstance(error, OSError) and error.errno:
            return -error.errno
        self.failure = error
        return -_UNEXPECTED

    cdef read(self, int descriptor, void *buffer, size_t size):
        view = <uint8_t[:size]><uint8_t *>buffer
        return self.calls.readv(descriptor, (memoryview(view),))

    cdef write(self, int descriptor, const iovec *parts, int count):
        return self.calls.writev(descriptor, [_part(&parts[i]) for i in range(count)])

    cdef receive(self, mmsghdr *message):
        """One message as recvmmsg has it."""
        cdef size_t size = message.msg_hdr.msg_iov.iov_len
        view = <uint8_t[:size]><uint8_t *>message.msg_hdr.msg_iov.iov_base
        length, ancillary, flags, address = self.calls.recvmsg_into((memoryview(view),), message.msg_hdr.msg_controllen)
        cdef bytes control = b"".join(map(_encode_control, ancillary))
        cdef bytes name = _encode_name(address)
        if len(control) > <Py_ssize_t>message.msg_hdr.msg_controllen:
            raise ValueError("more control messages than there is room for")
        memcpy(message.msg_hdr.msg_control, PyBytes_AS_STRING(control), len(control))
        message.msg_hdr.msg_controllen = len(control)
        memcpy(message.msg_hdr.msg_name, PyBytes_AS_STRING(name), len(name))
        message.msg_hdr.msg_flags = flags
        message.msg_len = length

    cdef send(self, const msghdr *message):
        data = b"".join([_part(&message.msg_iov[i]) for i in range(message.msg_iovlen)])
        control = PyBytes_FromStringAndSize(<const char *>message.msg_control, message.msg_controllen)
        ancillary = _decode_controls(control)
        step = len(data)
        for level, kind, value in ancillary:
            if (level, kind) == (_UDP_LEVEL, _UDP_SEGMENT_TYPE):
                (step,) = struct.unpack("=H", value)
        address = _decode_name(PyBytes_FromStringAndSize(<const char *>message.msg_name, message.msg_namelen))
        payloads = [data[at : at + step] for at in range(0, len(data), step)]
        return self.calls.sendmsg(payloads, ancillary, 0, address)


cdef bytes _part(const iovec *part):
    return PyBytes_FromStringAndSize(<const char *>part.iov_base, part.iov_len)


def _encode_control(ancillary):
    level, kind, data = ancillary
    padding = -len(data) % _CONTROL_ALIGNMENT
    return _CONTROL_HEADER.pack(_CONTROL_HEADER.size + len(data), level, kind) + data + bytes(padding)


def _decode_controls(data):
    found, at = [], 0
    while at + _CONTROL_HEADER.size <= len(data):
        length, level, kind = _CONTROL_HEADER.unpack_from(data, at)
        found.append((level, kind, data[at + _CONTROL_HEADER.size : at + length]))
        at += length + -length % _CONTROL_ALIGNMENT
    return found


def _encode_name(address):
    ip, port = Endpoint.of(*address[:2])
    head = struct.pack("=H", AF_INET if len(ip) == 4 else AF_INET6) + struct.pack(">H", port)
    return head + (ip + bytes(8) if len(ip) == 4 else bytes(4) + ip + bytes(4))


def _decode_name(name):
    (family,), (port,) = struct.unpack_from("=H", name), struct.unpack_from(">H", name, 2)
    ip = name[4:8] if family == AF_INET else name[8:24]
    return Endpoint(ip, port).host, port


cdef Py_ssize_t _played_read(void *context, int descriptor, void *buffer, size_t size) noexcept with gil:
    played = <PlayedKernel>context
    try:
        return played.read(descriptor, buffer, size)
    except BaseException as error:
        return played.failed(error)


cdef Py_ssize_t _played_write(void *context, int descriptor, const iovec *parts, int count) noexcept with gil:
    played = <PlayedKernel>context
    try:
        return played.write(descriptor, parts, count)
    except BaseException as error:
        return played.failed(error)


cdef int _played_receive(void *context, int descriptor, mmsghdr *messages, unsigned int count) noexcept with gil:
    """As recvmmsg does it: an error after the first message waits for the next call."""
    played = <PlayedKernel>context
    cdef unsigned int i
    if played.pending:
        i, played.pending = played.pending, 0
        return -<int>i
    for i in range(count):
        try:
            played.receive(&messages[i])
        except BaseException as error:
            code = played.failed(error)
            if i == 0:
                return code
            if code != -errno.EAGAIN:
                played.pending = -code
            return i
    return count


cdef Py_ssize_t _played_send(void *context, int descriptor, const msghdr *message) noexcept with gil:
    played = <PlayedKernel>context
    try:
        return played.send(message)
    except BaseException as error:
        return played.failed(error)


cdef tun_calls tun_played
tun_played.read = _played_read
tun_played.write = _played_write
cdef udp_calls udp_played
udp_played.receive = _played_receive
udp_played.send = _played_send
