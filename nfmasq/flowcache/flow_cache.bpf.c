// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* The flow cache: rewrites the packets of known flows in the kernel.
 *
 * Theory of operation. nfmasq, in user space, decides about every flow: it makes the entry, chooses
 * the port, follows the state. A flow that lasts is put into the map `flows`, a direction at a time,
 * with all that its packets need. Here its packets are found and rewritten. A packet that opens or
 * closes a flow, and every packet that is odd, is left alone: the rules lead it to nfmasq, as ever.
 *
 *   routed:  inside ----> ingress: known? mark ----> rules, routing ----> egress: rewrite source ----> outside
 *            inside <---- rules, routing <---- ingress: known? rewrite destination, mark <---- outside
 *
 *   direct:  inside <---> ingress: known? rewrite, look up the route, redirect <---> outside
 *
 * A source cannot be rewritten before the kernel has routed the packet, since the kernel takes no
 * packet with an address of its own as the source. So a packet from the inside is only marked where
 * it comes in. The mark, KNOWN, tells the rules that the packet need not go to nfmasq. A packet is
 * marked only where its route leads to the interface by which its flow leaves, and does not cut it.
 *
 * A packet that has to go to nfmasq makes its flow STALE: the packets behind it must not overtake
 * it, and go the same way. nfmasq puts the flow anew when the packets before are on their way.
 *
 * The program at the egress of an outside interface is also a guard. What comes from an inside
 * interface and has no masquerade address as its source there, and is not known, is dropped: no
 * inside address leaves, whatever has become of the rules or of the flow in the meantime. Where no
 * flows are carried, a program that does nothing else stands there.
 *
 * An inside host that sends more than nfmasq can handle is put into the map `crowding`. From then on
 * only some of its packets go on to nfmasq, at an even pace; packets of known flows are not
 * concerned. The host is let go when it has kept to the pace for a while.
 *
 * Numbers are as packets have them, in network order, unless a comment says otherwise. nfmasq
 * computes what a rewrite changes in a checksum (`change`), once for a flow. See flows.py.
 */
#include <stdbool.h>
#include <stddef.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define GO_ON TC_ACT_UNSPEC /* as without us: programs of others at the interface follow */
#define KNOWN 0x10000000 /* a bit of the packet's mark; see nfmasq-rules */
#define AF_INET 2
#define FRAGMENT bpf_htons(0x3fff)
#define OFFSET bpf_htons(0x1fff)
#define MORE_FRAGMENTS bpf_htons(0x2000)
#define DONT_FRAGMENT bpf_htons(0x4000)
#define COUNTERS 4096
#define SPURT 10000000 /* nanoseconds: how far a held host may be ahead of its pace */
#define HOLD 1000000000 /* nanoseconds without a packet too many, after which a host is let go */
#define MOST_QUEUED 65531 /* bytes of a packet that NFQUEUE has room for */

enum direction { OUT, IN };
enum { STALE = 1 }; /* flags of a flow: its packets go to nfmasq until it is put anew */
enum { INSIDE = 1, OUTSIDE = 2, ETHERNET = 4 }; /* flags of an interface */

struct key {
	__be32 saddr, daddr;
	__be16 sport, dport;
	__u8 protocol;
	__u8 direction;
	__u16 zero;
};

struct flow {
	__be32 address; /* what takes the place of the source (OUT) or of the destination (IN) */
	__be16 port;
	__u16 flags;
	__u32 outside; /* OUT: the index of the interface by which the flow leaves */
	__wsum address_change;
	__wsum port_change;
	__be32 ack; /* of the last segment of TCP; see table/numbers.py */
	__u64 packets;
	__u64 bytes; /* of the packets, IP headers included */
	__u64 last; /* when the last packet came: nanoseconds on the monotonic clock, to a few milliseconds */
	__be16 window; /* of the last segment of TCP */
	__u16 zero[3];
};

struct datagram {
	__be32 saddr, daddr;
	__be16 id;
	__u8 protocol;
	__u8 zero;
};

struct end {
	__u8 last[4]; /* the last bytes of a datagram */
	__u32 length; /* how many of them are data of its last fragment; they come last in `last` */
};

struct pace {
	__u64 interval; /* nanoseconds between two packets */
	__u64 due;      /* when the next packet may come, on the monotonic clock */
	__u64 until;    /* when the host is let go */
};

struct counts {
	__u64 packets[2]; /* by direction: packets of known flows */
	__u64 bytes[2];
	__u64 dropped; /* packets that would have left with an inside address */
	__u64 held; /* packets of hosts that sent more than their pace */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct key);
	__type(value, struct flow);
} flows SEC(".maps");

struct { /* flags by index of an interface */
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, __u32);
} interfaces SEC(".maps");

struct { /* the masquerade addresses there are, or have been */
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __be32);
	__type(value, __u32);
} maddrs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counts);
} counted SEC(".maps");

struct { /* the next identification of packets that may be fragmented, in host order: odd numbers */
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, __u32);
	__type(value, __u32);
} identifications SEC(".maps");

struct { /* by inside address: hosts that send more than nfmasq can handle */
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, __be32);
	__type(value, struct pace);
} crowding SEC(".maps");

struct { /* what NFQUEUE leaves out of datagrams that are too long for it; see daemon/oversize.py */
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct datagram);
	__type(value, struct end);
} ends SEC(".maps");

struct packet {
	struct key key;
	__u32 check;   /* where the transport checksum stands, in bytes */
	__u32 flags;   /* of bpf_l4_csum_replace */
	__be32 ack;    /* of TCP, else 0; and the window */
	__be16 window;
	__u16 length;  /* in bytes, host order */
	__u16 headers; /* bytes of both headers, host order */
	__u8 tos;
	bool is_fragment; /* a first fragment, which has ports */
};

static __always_inline struct iphdr *header_of(struct __sk_buff *skb, int link, int more)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (data + link + sizeof(struct iphdr) + more > end)
		return NULL;
	return data + link;
}

/* Note the end of a datagram of which NFQUEUE hands over no more than the beginning; returns false.
 * A last fragment is there to be read only here, before the kernel puts the datagram together. */
static __noinline bool note_end(struct __sk_buff *skb, int link)
{
	struct iphdr *ip = header_of(skb, link, 0);
	struct datagram datagram = {};
	__u32 offset, header, length;
	struct end end = {};

	if (!ip || ip->version != 4 || ip->ihl < 5 || ip->frag_off & MORE_FRAGMENTS)
		return false;
	offset = bpf_ntohs(ip->frag_off & OFFSET) * 8;
	header = ip->ihl * 4;
	length = bpf_ntohs(ip->tot_len);
	if (!offset || offset + length <= MOST_QUEUED || length <= header)
		return false;
	datagram.saddr = ip->saddr;
	datagram.daddr = ip->daddr;
	datagram.id = ip->id;
	datagram.protocol = ip->protocol;
	end.length = length - header;
	if (end.length > sizeof(end.last))
		end.length = sizeof(end.last);
	if (!bpf_skb_load_bytes(skb, link + length - sizeof(end.last), end.last, sizeof(end.last)))
		bpf_map_update_elem(&ends, &datagram, &end, BPF_ANY);
	return false;
}

/* Read a packet whose flow may be known, as the fast path of nfmasq does (engine/fastpath.py). */
static __always_inline bool read_packet(struct __sk_buff *skb, int link, enum direction direction,
					struct packet *packet)
{
	struct iphdr *ip = header_of(skb, link, sizeof(struct udphdr));

	if (!ip || ip->version != 4 || ip->ihl != 5 || ip->frag_off & OFFSET)
		return note_end(skb, link);
	packet->length = bpf_ntohs(ip->tot_len);
	if (packet->length > skb->len - link)
		return false;
	packet->tos = ip->tos;
	packet->is_fragment = ip->frag_off & FRAGMENT;
	__builtin_memset(&packet->key, 0, sizeof(packet->key));
	packet->key.saddr = ip->saddr;
	packet->key.daddr = ip->daddr;
	packet->key.protocol = ip->protocol;
	packet->key.direction = direction;
	if (ip->protocol == IPPROTO_UDP) {
		struct udphdr *udp = (void *)(ip + 1);
		__u16 length = bpf_ntohs(udp->len);

		if (length < sizeof(*udp))
			return false;
		if (!packet->is_fragment && length + sizeof(*ip) > packet->length)
			return false;
		packet->key.sport = udp->source;
		packet->key.dport = udp->dest;
		packet->check = link + sizeof(*ip) + offsetof(struct udphdr, check);
		packet->flags = BPF_F_MARK_MANGLED_0;
		packet->ack = packet->window = 0;
		packet->headers = sizeof(*ip) + sizeof(*udp);
		return true;
	}
	if (ip->protocol != IPPROTO_TCP || !(ip = header_of(skb, link, sizeof(struct tcphdr))))
		return false;
	struct tcphdr *tcp = (void *)(ip + 1);

	if (!tcp->ack || tcp->syn || tcp->fin || tcp->rst)
		return false;
	packet->headers = sizeof(*ip) + tcp->doff * 4;
	if (tcp->doff < 5 || packet->headers > packet->length)
		return false;
	packet->key.sport = tcp->source;
	packet->key.dport = tcp->dest;
	packet->check = link + sizeof(*ip) + offsetof(struct tcphdr, check);
	packet->flags = 0;
	packet->ack = tcp->ack_seq;
	packet->window = tcp->window;
	return true;
}

static __always_inline bool is_ipv4(struct __sk_buff *skb)
{
	/* A frame with a tag belongs to a VLAN, and so to another interface. */
	return skb->protocol == bpf_htons(ETH_P_IP) && !skb->vlan_present;
}

/* Ask for the route of a packet, as the kernel would route it on its way in, for its own length or
 * for the length of what a superpacket is cut into. */
static __always_inline long look_up_route(struct __sk_buff *skb, struct packet *packet,
					  struct flow *flow, enum direction direction,
					  struct bpf_fib_lookup *route)
{
	route->family = AF_INET;
	route->ifindex = skb->ifindex;
	route->tos = packet->tos;
	route->l4_protocol = packet->key.protocol;
	route->sport = packet->key.sport;
	route->dport = direction == OUT ? packet->key.dport : flow->port;
	route->ipv4_src = packet->key.saddr;
	route->ipv4_dst = direction == OUT ? packet->key.daddr : flow->address;
	route->tot_len = skb->gso_size ? skb->gso_size + packet->headers : packet->length;
	return bpf_fib_lookup(skb, route, sizeof(*route), 0);
}

/* Say whether a packet leaves by its flow's interface, uncut. */
static __always_inline bool leaves_whole(struct __sk_buff *skb, struct packet *packet,
					 struct flow *flow)
{
	struct bpf_fib_lookup route = {};
	long found = look_up_route(skb, packet, flow, OUT, &route);

	if (found != BPF_FIB_LKUP_RET_SUCCESS && found != BPF_FIB_LKUP_RET_NO_NEIGH)
		return false;
	return route.ifindex == flow->outside;
}

/* Find the flow of a packet; NULL where the packet has to go to nfmasq. */
static __always_inline struct flow *find(struct packet *packet)
{
	struct flow *flow = bpf_map_lookup_elem(&flows, &packet->key);

	if (flow && packet->is_fragment)
		flow->flags |= STALE;
	return flow && !(flow->flags & STALE) ? flow : NULL;
}

static __always_inline struct counts *counts(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&counted, &zero);
}

static __always_inline int drop(void)
{
	struct counts *all = counts();

	if (all)
		all->dropped++;
	return TC_ACT_SHOT;
}

/* Let a packet from the inside go on to nfmasq, unless its host is held and is ahead of its pace. */
static __noinline int to_nfmasq(struct __sk_buff *skb, int link)
{
	struct iphdr *ip = header_of(skb, link, 0);
	__be32 saddr = ip ? ip->saddr : 0;
	struct pace *pace = bpf_map_lookup_elem(&crowding, &saddr);
	struct counts *all;
	__u64 now;

	if (!pace)
		return GO_ON;
	now = bpf_ktime_get_ns();
	if (now > pace->until)
		return GO_ON;
	if (pace->due <= now + SPURT) {
		pace->due = (pace->due > now ? pace->due : now) + pace->interval;
		return GO_ON;
	}
	pace->until = now + HOLD;
	all = counts();
	if (all)
		all->held++;
	return TC_ACT_SHOT;
}

static __always_inline void count(struct flow *flow, struct packet *packet, enum direction direction)
{
	struct counts *all = counts();

	__sync_fetch_and_add(&flow->packets, 1);
	__sync_fetch_and_add(&flow->bytes, packet->length);
	flow->last = bpf_ktime_get_coarse_ns();
	flow->ack = packet->ack;
	flow->window = packet->window;
	if (all) {
		all->packets[direction]++;
		all->bytes[direction] += packet->length;
	}
}

static __always_inline void change_checksum(__sum16 *check, __u32 change)
{
	__u32 sum = (__u16)~*check;

	sum += (change & 0xffff) + (change >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	*check = ~((sum & 0xffff) + (sum >> 16));
}

/* Give a packet that may be fragmented a new identification (see wire/identification.py). */
static __always_inline void identify(struct iphdr *ip, __u32 segments)
{
	__u32 *next, taken = 2 * (segments ? segments : 1);
	__u64 ends = (__u64)ip->saddr << 32 | ip->daddr;
	__u32 counter = ((ends ^ ip->protocol) * 0x9e3779b97f4a7c15ULL) >> 52;
	__be16 old = ip->id;

	next = bpf_map_lookup_elem(&identifications, &counter);
	if (!next)
		return;
	ip->id = bpf_htons((__u16)__sync_fetch_and_add(next, taken) | 1);
	change_checksum(&ip->check, (__u32)(__u16)~old + ip->id);
}

/* Rewrite a packet; its headers were read before. Returns false where that failed half-way. */
static __always_inline bool rewrite(struct __sk_buff *skb, int link, enum direction direction,
				    struct packet *packet, struct flow *flow, int hops)
{
	__be32 address = flow->address;
	__be16 port = flow->port;
	__u32 change = flow->address_change;
	struct iphdr *ip;
	__be16 *ports;

	/* The helper knows which checksums are to be filled in later, and must not be final now. */
	if (bpf_l4_csum_replace(skb, packet->check, 0, change, packet->flags | BPF_F_PSEUDO_HDR))
		return false;
	if (flow->port_change &&
	    bpf_l4_csum_replace(skb, packet->check, 0, flow->port_change, packet->flags))
		return false;
	ip = header_of(skb, link, sizeof(struct udphdr));
	if (!ip)
		return false;
	ports = (void *)(ip + 1);
	change_checksum(&ip->check, change);
	if (direction == OUT) {
		ip->saddr = address;
		ports[0] = port;
		if (!(ip->frag_off & DONT_FRAGMENT))
			identify(ip, skb->gso_segs);
	} else {
		ip->daddr = address;
		ports[1] = port;
	}
	if (hops) {
		ip->ttl--;
		change_checksum(&ip->check, bpf_htons(0xfeff));
	}
	return true;
}

/* -- routed ------------------------------------------------------------------------------ */

static __always_inline int mark_known(struct __sk_buff *skb, int link)
{
	struct packet packet;
	struct flow *flow;

	if (!is_ipv4(skb))
		return GO_ON;
	if (!read_packet(skb, link, OUT, &packet))
		return to_nfmasq(skb, link);
	flow = find(&packet);
	if (!flow)
		return to_nfmasq(skb, link);
	if (leaves_whole(skb, &packet, flow))
		skb->mark |= KNOWN;
	else
		flow->flags |= STALE;
	return GO_ON;
}

static __always_inline int demasquerade(struct __sk_buff *skb, int link)
{
	struct packet packet;
	struct flow *flow;

	if (!is_ipv4(skb) || !read_packet(skb, link, IN, &packet))
		return GO_ON;
	flow = find(&packet);
	if (!flow)
		return GO_ON;
	if (!rewrite(skb, link, IN, &packet, flow, 0))
		return drop();
	count(flow, &packet, IN);
	skb->mark |= KNOWN;
	return GO_ON;
}

static __always_inline bool has_maddr(struct __sk_buff *skb, int link)
{
	struct iphdr *ip = header_of(skb, link, 0);
	__be32 saddr = ip ? ip->saddr : 0;

	return bpf_map_lookup_elem(&maddrs, &saddr);
}

static __always_inline int guard(struct __sk_buff *skb, int link)
{
	return has_maddr(skb, link) ? GO_ON : drop();
}

static __always_inline bool is_from_inside(struct __sk_buff *skb)
{
	__u32 from = skb->ingress_ifindex, *flags;

	if (!from)
		return false;
	flags = bpf_map_lookup_elem(&interfaces, &from);
	return flags && *flags & INSIDE;
}

static __always_inline int masquerade(struct __sk_buff *skb, int link)
{
	bool known = skb->mark & KNOWN && skb->ingress_ifindex;
	struct packet packet;
	struct flow *flow;

	if (!is_ipv4(skb))
		return GO_ON;
	if (!known && (has_maddr(skb, link) || !is_from_inside(skb)))
		return GO_ON;
	if (known)
		skb->mark &= ~KNOWN;
	if (!read_packet(skb, link, OUT, &packet) || packet.is_fragment)
		return guard(skb, link);
	flow = bpf_map_lookup_elem(&flows, &packet.key);
	if (!flow)
		return guard(skb, link);
	if (flow->outside != skb->ifindex) {
		flow->flags |= STALE; /* it was routed otherwise than other packets: by a mark, or so */
		return drop();
	}
	if (!rewrite(skb, link, OUT, &packet, flow, 0))
		return drop();
	count(flow, &packet, OUT);
	return GO_ON;
}

/* Drop what comes from the inside without a masquerade address; marks mean nothing here. */
static __always_inline int only_guard(struct __sk_buff *skb, int link)
{
	if (!is_ipv4(skb) || has_maddr(skb, link) || !is_from_inside(skb))
		return GO_ON;
	return drop();
}

/* -- direct ------------------------------------------------------------------------------ */

static __always_inline int forward(struct __sk_buff *skb, enum direction direction)
{
	__u32 *flags, side = direction == OUT ? OUTSIDE : INSIDE;
	struct bpf_fib_lookup route = {};
	struct ethhdr *ethernet;
	struct packet packet;
	struct flow *flow;
	struct iphdr *ip;

	if (!is_ipv4(skb))
		return GO_ON;
	if (!read_packet(skb, ETH_HLEN, direction, &packet) || !(flow = find(&packet)))
		return direction == OUT ? to_nfmasq(skb, ETH_HLEN) : GO_ON;
	ip = header_of(skb, ETH_HLEN, 0);
	if (!ip || ip->ttl <= 1)
		return GO_ON;
	if (look_up_route(skb, &packet, flow, direction, &route) != BPF_FIB_LKUP_RET_SUCCESS ||
	    (direction == OUT && route.ifindex != flow->outside)) {
		flow->flags |= STALE;
		return GO_ON;
	}
	flags = bpf_map_lookup_elem(&interfaces, &route.ifindex);
	if (!flags || !(*flags & ETHERNET) || !(*flags & side))
		return GO_ON;

	if (!rewrite(skb, ETH_HLEN, direction, &packet, flow, 1))
		return drop();
	count(flow, &packet, direction);
	ethernet = (void *)(long)skb->data;
	if ((void *)(ethernet + 1) > (void *)(long)skb->data_end)
		return drop();
	__builtin_memcpy(ethernet->h_dest, route.dmac, ETH_ALEN);
	__builtin_memcpy(ethernet->h_source, route.smac, ETH_ALEN);
	return bpf_redirect(route.ifindex, 0);
}

/* -- the programs: by side of the gateway, and by whether the interface has Ethernet headers ---- */

SEC("tc") int inside_ether(struct __sk_buff *skb) { return mark_known(skb, ETH_HLEN); }
SEC("tc") int inside_bare(struct __sk_buff *skb) { return mark_known(skb, 0); }
SEC("tc") int outside_ether(struct __sk_buff *skb) { return demasquerade(skb, ETH_HLEN); }
SEC("tc") int outside_bare(struct __sk_buff *skb) { return demasquerade(skb, 0); }
SEC("tc") int leaving_ether(struct __sk_buff *skb) { return masquerade(skb, ETH_HLEN); }
SEC("tc") int leaving_bare(struct __sk_buff *skb) { return masquerade(skb, 0); }
SEC("tc") int guard_ether(struct __sk_buff *skb) { return only_guard(skb, ETH_HLEN); }
SEC("tc") int guard_bare(struct __sk_buff *skb) { return only_guard(skb, 0); }
SEC("tc") int inside_direct(struct __sk_buff *skb) { return forward(skb, OUT); }
SEC("tc") int outside_direct(struct __sk_buff *skb) { return forward(skb, IN); }

/* The kernel lends its helpers only to programs under a licence that goes with its own. */
char LICENSE[] SEC("license") = "Dual MIT/GPL";
