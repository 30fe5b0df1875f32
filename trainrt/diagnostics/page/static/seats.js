// Who sits where, and which rank and step are selected. The selection is the address: #rank=5&step=120, so it can be sent to others.
const TYPES = { u2: Uint16Array, u4: Uint32Array, f4: Float32Array };

export function unpack(packed) {
  const raw = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
  return new TYPES[packed.type](raw.buffer);
}

export const seats = { ranks: 0, hosts: [], host: [], slot: [], coordinates: {}, groups: {}, byHost: [] };

export function sit(plan) {
  seats.hosts = plan.hosts;
  seats.host = unpack(plan.host);
  seats.ranks = seats.host.length;
  for (const kind of ["coordinates", "groups"]) {
    seats[kind] = Object.fromEntries(Object.entries(plan[kind]).map(([axis, packed]) => [axis, unpack(packed)]));
  }
  seats.byHost = plan.hosts.map(() => []);
  seats.slot = new Uint32Array(seats.ranks);
  for (let rank = 0; rank < seats.ranks; rank++) {
    seats.slot[rank] = seats.byHost[seats.host[rank]].push(rank) - 1;
  }
}

export const hostOf = (rank) => seats.hosts[seats.host[rank]] ?? "?";

// The other ranks of a rank's group along each axis.
export function peersOf(rank) {
  const found = {};
  for (const [axis, group] of Object.entries(seats.groups)) {
    found[axis] = [];
    for (let other = 0; other < group.length; other++) {
      if (other !== rank && group[other] === group[rank]) found[axis].push(other);
    }
  }
  return found;
}

export const placeOf = (rank) => Object.entries(seats.coordinates).map(([axis, at]) => `${axis} ${at[rank]}`).join(", ");

export const selection = { rank: null, step: null };
const listeners = [];
export const onSelect = (listener) => listeners.push(listener);

export const address = (rank, step) => "#" + [rank === null ? "" : `rank=${rank}`, step === null ? "" : `step=${step}`].filter(Boolean).join("&");

// Moving about with keys replaces the address; links make a new one, so that "back" goes back.
export function select({ rank = selection.rank, step = selection.step }) {
  if (rank === selection.rank && step === selection.step) return;
  Object.assign(selection, { rank, step });
  history.replaceState(null, "", address(rank, step) === "#" ? location.pathname + location.search : address(rank, step));
  for (const listener of listeners) listener();
}

function fromAddress() {
  const rank = /\brank=(\d+)/.exec(location.hash), step = /\bstep=(\d+)/.exec(location.hash);
  if (!rank && !step) return;
  if (rank) selection.rank = Number(rank[1]);
  if (step) selection.step = Number(step[1]);
  for (const listener of listeners) listener();
  document.getElementById(step ? "timeline-section" : "heat-section").scrollIntoView({ block: "start" });
}

addEventListener("hashchange", fromAddress);
export const begin = fromAddress;
