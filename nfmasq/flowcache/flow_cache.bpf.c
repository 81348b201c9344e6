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
 * marked only where the interface by which its flow leaves is there, and wide enough. Where the kernel
 * cuts it all the same, its pieces are lost, and no packet of its flow is marked any more.
 *
 * The program at the egress of an outside interface is also a guard. What comes from an inside
 * interface and has no masquerade address as its source there, and is not known, is dropped: no
 * inside address leaves, whatever has become of the rules or of the flow in the meantime.
 *
 * Numbers are as packets have them, in network order, unless a comment says otherwise. nfmasq
 * computes what a rewrite changes in a checksum (`change`), once for a flow. See cache.py.
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

#define KNOWN 0x10000000 /* a bit of the packet's mark; see nfmasq-rules */
#define AF_INET 2
#define FRAGMENT bpf_htons(0x3fff)
#define MORE_FRAGMENTS bpf_htons(0x2000)
#define DONT_FRAGMENT bpf_htons(0x4000)
#define COUNTERS 4096
#define ON TC_ACT_UNSPEC /* let the packet go on its way; who else has a filter here sees it too */

enum direction { OUT, IN };
enum { STALE = 1, CUT = 2 }; /* flags of a flow, whose packets go to nfmasq: see masquerade, cut */
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
	__u32 zero;
	__u64 packets;
	__u64 bytes; /* of the packets, IP headers included */
	__u64 last;  /* when the last packet came: nanoseconds on the monotonic clock */
};

struct counts {
	__u64 packets[2]; /* by direction: packets of known flows */
	__u64 bytes[2];
	__u64 dropped; /* packets that would have left with an inside address */
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

struct packet {
	struct key key;
	__u32 check;  /* where the transport checksum stands, in bytes */
	__u32 flags;  /* of bpf_l4_csum_replace */
	__u16 length;  /* in bytes, host order */
	__u16 headers; /* of this, the headers of IP and of transport */
};

static __always_inline struct iphdr *header_of(struct __sk_buff *skb, int link, int more)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (data + link + sizeof(struct iphdr) + more > end)
		return NULL;
	return data + link;
}

/* Read a packet whose flow may be known, as the fast path of nfmasq does (engine/fastpath.py). */
static __always_inline bool read_packet(struct __sk_buff *skb, int link, enum direction direction,
					struct packet *packet)
{
	struct iphdr *ip = header_of(skb, link, sizeof(struct udphdr));

	if (!ip || ip->version != 4 || ip->ihl != 5 || ip->frag_off & FRAGMENT)
		return false;
	packet->length = bpf_ntohs(ip->tot_len);
	if (packet->length > skb->len - link)
		return false;
	__builtin_memset(&packet->key, 0, sizeof(packet->key));
	packet->key.saddr = ip->saddr;
	packet->key.daddr = ip->daddr;
	packet->key.protocol = ip->protocol;
	packet->key.direction = direction;
	if (ip->protocol == IPPROTO_UDP) {
		struct udphdr *udp = (void *)(ip + 1);
		__u16 length = bpf_ntohs(udp->len);

		if (length < sizeof(*udp) || length + sizeof(*ip) > packet->length)
			return false;
		packet->key.sport = udp->source;
		packet->key.dport = udp->dest;
		packet->check = link + sizeof(*ip) + offsetof(struct udphdr, check);
		packet->flags = BPF_F_MARK_MANGLED_0;
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
	return true;
}

static __always_inline bool is_ipv4(struct __sk_buff *skb)
{
	/* A frame with a tag belongs to a VLAN, and so to another interface. */
	return skb->protocol == bpf_htons(ETH_P_IP) && !skb->vlan_present;
}

/* Return the length of a packet, or of the largest segment of a superpacket, in bytes. */
static __always_inline __u32 length_of(struct __sk_buff *skb, struct packet *packet)
{
	return skb->gso_size ? packet->headers + skb->gso_size : packet->length;
}

static __always_inline bool is_wide_enough(struct __sk_buff *skb, __u32 interface,
					   struct packet *packet)
{
	__u32 mtu = 0;

	/* The helper compares lengths with link headers, which differ from one interface to another:
	 * it is asked for the MTU alone. It also answers whether the interface is there at all. */
	return bpf_check_mtu(skb, interface, &mtu, 0, 0) >= 0 && length_of(skb, packet) <= mtu;
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

static __always_inline void count(struct flow *flow, struct packet *packet, enum direction direction)
{
	struct counts *all = counts();

	__sync_fetch_and_add(&flow->packets, 1);
	__sync_fetch_and_add(&flow->bytes, packet->length);
	flow->last = bpf_ktime_get_ns();
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

	if (!is_ipv4(skb) || !read_packet(skb, link, OUT, &packet))
		return ON;
	flow = bpf_map_lookup_elem(&flows, &packet.key);
	if (flow && !flow->flags && is_wide_enough(skb, flow->outside, &packet))
		skb->mark |= KNOWN;
	return ON;
}

static __always_inline int demasquerade(struct __sk_buff *skb, int link)
{
	struct packet packet;
	struct flow *flow;

	if (!is_ipv4(skb) || !read_packet(skb, link, IN, &packet))
		return ON;
	flow = bpf_map_lookup_elem(&flows, &packet.key);
	if (!flow)
		return ON;
	if (!rewrite(skb, link, IN, &packet, flow, 0))
		return drop();
	count(flow, &packet, IN);
	skb->mark |= KNOWN;
	return ON;
}

static __always_inline int guard(struct __sk_buff *skb, int link)
{
	struct iphdr *ip = header_of(skb, link, 0);
	__be32 saddr = ip ? ip->saddr : 0;

	return bpf_map_lookup_elem(&maddrs, &saddr) ? ON : drop();
}

static __always_inline bool is_from_inside(struct __sk_buff *skb)
{
	__u32 from = skb->ingress_ifindex, *flags;

	if (!from)
		return false;
	flags = bpf_map_lookup_elem(&interfaces, &from);
	return flags && *flags & INSIDE;
}

/* Note that the kernel has cut a packet since it was marked, as a narrow route may have it done. */
static __always_inline void cut(struct __sk_buff *skb, int link)
{
	struct iphdr *ip = header_of(skb, link, 4);
	struct key key = { .direction = OUT };
	struct flow *flow;
	__be16 *ports;

	if (!ip || ip->ihl != 5 || (ip->frag_off & FRAGMENT) != MORE_FRAGMENTS)
		return; /* only the first piece has ports */
	ports = (void *)(ip + 1);
	key.saddr = ip->saddr;
	key.daddr = ip->daddr;
	key.sport = ports[0];
	key.dport = ports[1];
	key.protocol = ip->protocol;
	flow = bpf_map_lookup_elem(&flows, &key);
	if (flow)
		flow->flags |= CUT;
}

static __always_inline int masquerade(struct __sk_buff *skb, int link)
{
	bool known = skb->mark & KNOWN && skb->ingress_ifindex;
	struct packet packet;
	struct flow *flow;

	if (!is_ipv4(skb) || !(known || is_from_inside(skb)))
		return ON;
	if (known)
		skb->mark &= ~KNOWN;
	if (!read_packet(skb, link, OUT, &packet)) {
		if (known)
			cut(skb, link);
		return guard(skb, link);
	}
	flow = bpf_map_lookup_elem(&flows, &packet.key);
	if (!flow)
		return guard(skb, link);
	if (flow->outside != skb->ifindex) {
		flow->flags |= STALE; /* the next packet goes to nfmasq, which knows the new way */
		return drop();
	}
	if (!rewrite(skb, link, OUT, &packet, flow, 0))
		return drop();
	count(flow, &packet, OUT);
	return ON;
}

/* -- direct ------------------------------------------------------------------------------ */

static __always_inline int forward(struct __sk_buff *skb, enum direction direction)
{
	struct bpf_fib_lookup route = { .family = AF_INET, .ifindex = skb->ifindex };
	struct packet packet;
	struct flow *flow;
	struct iphdr *ip;
	struct ethhdr *ethernet;
	__u32 *flags;

	if (!is_ipv4(skb) || !read_packet(skb, ETH_HLEN, direction, &packet))
		return ON;
	flow = bpf_map_lookup_elem(&flows, &packet.key);
	if (!flow || flow->flags)
		return ON;
	ip = header_of(skb, ETH_HLEN, 0);
	if (!ip || ip->ttl <= 1)
		return ON;

	route.tot_len = length_of(skb, &packet);
	route.tos = ip->tos;
	route.l4_protocol = ip->protocol;
	route.sport = packet.key.sport;
	route.dport = direction == OUT ? packet.key.dport : flow->port;
	route.ipv4_src = ip->saddr;
	route.ipv4_dst = direction == OUT ? ip->daddr : flow->address;
	if (bpf_fib_lookup(skb, &route, sizeof(route), 0) != BPF_FIB_LKUP_RET_SUCCESS)
		return ON;
	if (direction == OUT && route.ifindex != flow->outside)
		return ON;
	flags = bpf_map_lookup_elem(&interfaces, &route.ifindex);
	if (!flags || !(*flags & ETHERNET) || !(*flags & (direction == OUT ? OUTSIDE : INSIDE)))
		return ON;

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
SEC("tc") int inside_direct(struct __sk_buff *skb) { return forward(skb, OUT); }
SEC("tc") int outside_direct(struct __sk_buff *skb) { return forward(skb, IN); }

/* The kernel lends its helpers only to programs under a licence that goes with its own. */
char LICENSE[] SEC("license") = "Dual MIT/GPL";
