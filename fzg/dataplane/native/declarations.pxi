cdef extern from "<sys/socket.h>" nogil:
    int AF_INET
    int AF_INET6

cdef extern from "cipher.h" nogil:
    enum:
        KEY_SIZE
    bint cipher_load(const char *path)

cdef extern from "octets.h" nogil:
    ctypedef struct seed "struct seed":
        uint64_t words[4]

cdef extern from "packet.h" nogil:
    enum:
        MTU
        PROTOCOL_TCP

    ctypedef struct flow_key "struct flow_key":
        uint8_t octets[40]
        uint8_t size

    ctypedef struct translation "struct translation":
        pass

    uint32_t key_l4_offset(const flow_key *key)
    void translation_init(
        translation *made, const flow_key *key, const uint8_t *ip, uint16_t port, bint inbound, flow_key *translated
    )

cdef extern from "system_calls.h" nogil:
    enum:
        ERRNO_LIMIT

    ctypedef struct iovec "struct iovec":
        void *iov_base
        size_t iov_len

    ctypedef struct msghdr "struct msghdr":
        void *msg_name
        uint32_t msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags

    ctypedef struct mmsghdr "struct mmsghdr":
        msghdr msg_hdr
        unsigned int msg_len

    ctypedef struct tun_calls "struct tun_calls":
        Py_ssize_t (*read)(void *context, int descriptor, void *buffer, size_t size) noexcept
        Py_ssize_t (*write)(void *context, int descriptor, const iovec *parts, int count) noexcept

    ctypedef struct udp_calls "struct udp_calls":
        int (*receive)(void *context, int descriptor, mmsghdr *messages, unsigned int count) noexcept
        Py_ssize_t (*send)(void *context, int descriptor, const msghdr *message) noexcept

    const tun_calls tun_kernel
    const udp_calls udp_kernel

cdef extern from "state.h" nogil:
    ctypedef struct endpoint "struct endpoint":
        uint8_t ip[16]
        uint8_t size
        uint16_t port

    ctypedef struct arrival "struct arrival":
        uint8_t *octets
        uint32_t length
        uint32_t stride
        endpoint source
        endpoint local
        uint8_t ecn

    ctypedef struct session "struct session":
        engine_peer *peer
        bint sent_data
        bint received_data

    ctypedef struct engine_path "struct path":
        bint known
        bint has_source
        uint8_t source[16]
        endpoint destination
        int32_t channel

    ctypedef struct engine_peer "struct peer":
        session *current
        engine_path path
        double first_unanswered_sent
        double first_unanswered_received
        double last_sent
        double last_received
        double last_data

    ctypedef struct flow "struct flow":
        engine_peer *peer
        flow_key key
        flow_key translated_key
        translation translation
        bint is_translated
        bint inbound
        bint is_tcp
        uint8_t l4_offset
        double valid_until
        int64_t token

    ctypedef struct report "struct report":
        int64_t token
        uint64_t packets
        uint64_t payload_octets
        double last_packet

    ctypedef struct reports "struct reports":
        report *entries
        size_t count

    ctypedef struct engine_state "struct state":
        size_t max_flows

    ctypedef enum install "enum install":
        INSTALLED
        INSTALL_TABLE_FULL
        INSTALL_NO_MEMORY

    engine_peer *state_peer(const engine_state *state, int64_t handle)
    engine_peer *state_make_peer(engine_state *state, int64_t handle)
    void state_remove_peer(engine_state *state, engine_peer *removed)
    session *state_session(const engine_state *state, uint32_t local_index)
    bint state_add_session(
        engine_state *state, engine_peer *owner, uint32_t local_index, uint32_t remote_index,
        const uint8_t *receive_key, const uint8_t *send_key
    )
    void state_remove_session(engine_state *state, session *removed)
    bint state_set_channel(engine_state *state, const endpoint *relay, uint16_t number, bint usable)
    install engine_install_flow(engine *used, const flow *verdict)
    bint state_sweep(engine_state *state, double now, reports *swept)
    void peer_note_sent(engine_peer *noted, double now)
    void peer_note_received(engine_peer *noted, double now)

cdef extern from "tun_port.h" nogil:
    ctypedef struct tun_counters "struct tun_counters":
        uint64_t calls
        uint64_t packets
        uint64_t octets
        uint64_t queue_full
        uint64_t *errors

    ctypedef struct tun_port "struct tun_port":
        bint attached
        bint vnet_hdr
        bint coalesce
        int refused
        int descriptor
        const tun_calls *calls
        void *calls_context
        uint32_t queued
        uint32_t max_queued
        tun_counters counters

cdef extern from "backlog.h" nogil:
    enum:
        LANES

    ctypedef struct backlog "struct backlog":
        uint32_t lanes_used
        uint64_t max_cost
        int64_t quantum
        uint64_t dropped

cdef extern from "udp_port.h" nogil:
    ctypedef struct udp_counters "struct udp_counters":
        uint64_t calls
        uint64_t packets
        uint64_t octets
        uint64_t queue_full
        uint64_t oversized
        uint64_t without_local_address
        uint64_t icmp_errors
        uint64_t receive_errors
        uint64_t *errors

    ctypedef struct udp_port "struct udp_port":
        bint attached
        bint segmentation
        int refused
        int family
        int descriptor
        uint16_t number
        const udp_calls *calls
        void *calls_context
        uint32_t queued
        uint32_t max_data
        uint32_t max_control
        udp_counters counters

cdef extern from "engine.h" nogil:
    enum:
        DATA_OVERHEAD

    ctypedef enum event_kind "enum event_kind":
        EVENT_DATAGRAM
        EVENT_CONFIRMED
        EVENT_INNER_PACKET
        EVENT_OUTBOUND_PACKET
        EVENT_FLOW_REPORT

    ctypedef struct event "struct event":
        event_kind kind
        uint8_t ecn
        uint32_t size
        uint32_t local_index
        int64_t peer
        const uint8_t *octets
        endpoint source
        endpoint local
        report report

    ctypedef struct turn "struct turn":
        event *events
        uint32_t event_count

    ctypedef struct engine_counters "struct engine_counters":
        uint64_t udp_rx_calls
        uint64_t udp_rx_packets
        uint64_t udp_rx_bytes
        uint64_t tun_rx_calls
        uint64_t tun_rx_packets
        uint64_t tun_rx_bytes
        uint64_t drop_udp_oversized
        uint64_t drop_udp_no_socket
        uint64_t drop_tun_malformed
        uint64_t drop_tun_not_attached
        uint64_t drop_replayed
        uint64_t drop_undecryptable
        uint64_t drop_inner_not_ip
        uint64_t drop_inner_truncated
        uint64_t drop_inner_oversized
        uint64_t drop_revoked
        uint64_t drop_no_memory
        uint64_t flow_table_full

    ctypedef struct engine "struct engine":
        engine_state state
        engine_counters counters
        tun_port tun
        udp_port udp[2]
        turn turn
        backlog from_udp
        backlog from_tun
        uint32_t turn_packets
        uint32_t urgent_packets
        uint32_t turn_judged
        uint32_t flush_packets
        bint awaits_verdicts

    bint engine_has_backlog(const engine *asked, bint from_tun)
    bint engine_init(engine *made, const seed *random_seed)
    void engine_free(engine *freed)
    udp_port *engine_udp(engine *owner, bint is_ipv4)
    int engine_receive_udp(engine *used, bint is_ipv4, double now)
    int engine_receive_tun(engine *used, double now)
    void engine_handle_datagram(engine *used, const arrival *datagram, double now)
    void engine_handle_packet(engine *used, const uint8_t *packet, uint32_t length, double now)
    void engine_end_turn(engine *used)
    int64_t CORE
    void engine_write_tun(engine *used, const uint8_t *packet, uint32_t length, int64_t owner)
    void engine_transmit(
        engine *used, const endpoint *destination, const uint8_t *source, uint8_t ecn, const uint8_t *octets, uint32_t size,
        int64_t owner
    )
    bint engine_seal(
        engine *used, engine_peer *owner, const uint8_t *packet, uint32_t size, double now, uint8_t *message
    )
    void engine_revoke(engine *used, engine_peer *owner)
    bint engine_flush(engine *used)
