// Defender events: what Defenders have told, the newest first. Must never take a text of a host for anything but text.

import { list, part } from './api.js';
import { h, show } from './dom.js';
import { live } from './live.js';
import { button, card, field, form, page, table, when } from './parts.js';
import { bytes, nothing } from './words.js';

const ROWS = 50;
// Milliseconds between two looks at the first page while it is open.
const PACE = 5_000;
const COLUMNS = [['When', 'time-column'], ['Defender', 'user-column'], ['What', 'what-column'], ['Before and after', 'wide-column']];
const KINDS = [['', 'everything'], ['file', 'changes of files'], ['others', 'everything else']];
const WORDS = {
  baseline: 'knows what there is',
  limit: 'does not watch everything: there is too much',
  dropped: 'lost events: its queue was full',
  cut: 'lost the unreadable end of its queue',
  setBack: 'goes on behind what is stored: its folder was set back',
};

// The Defender whose events alone are wanted: { id, name }, or null.
let chosen = null;

// Shows the events of this Defender alone from now on.
export function only(defender) {
  chosen = defender;
}

const FIELDS = [
  ['owner', (file) => `${file.owner ?? file.uid}:${file.group ?? file.gid}`],
  ['mode', (file) => file.mode],
  ['size', (file) => (file.kind === 'file' ? bytes(file.size) : '')],
  ['SHA-256', (file) => file.sha256 ?? ''],
];

// What differs between two looks at a file, or what a file is that there was none of.
function difference({ before, after }) {
  const lines = FIELDS.flatMap(([name, of]) => {
    const [old, now] = [before, after].map((file) => (file && typeof file === 'object' ? String(of(file) ?? '') : null));
    if (old === now || (!old && !now)) return [];
    const text = old === null ? now : now === null ? old : `${old || 'none'} → ${now || 'none'}`;
    return [h('div', {}, h('span', { class: 'quiet' }, `${name}: `), h('span', { class: 'mono' }, text))];
  });
  return lines.length > 0 && h('div', { class: 'difference' }, lines);
}

// What another kind of event says.
function details(event) {
  if (event === null || typeof event !== 'object') return String(event ?? '');
  const line = ([name, value]) => h('div', {}, h('span', { class: 'quiet' }, `${name}: `), typeof value === 'string' ? value : JSON.stringify(value));
  return h('div', { class: 'difference' }, Object.entries(event).map(line));
}

function row({ defender, name, sequence, time, kind, event }) {
  const file = kind === 'file' && event !== null && typeof event === 'object';
  const what = file
    ? [h('strong', {}, `${event.change} `), h('span', { class: 'mono' }, event.path), event.heldBack > 0 && h('div', { class: 'quiet' }, `${event.heldBack} more changes were held back`)]
    : [h('strong', {}, kind), WORDS[kind] && h('div', { class: 'quiet' }, WORDS[kind])];
  return {
    key: `${defender}/${sequence}`,
    cells: [when(time / 1000), [name, h('div', { class: 'quiet' }, `number ${sequence}`)], what, file ? difference(event) : details(event)],
  };
}

export function open(root) {
  // `cursors`: those of the pages from the second one to this one.
  const state = { rows: null, next: null, cursors: [], kind: '', problem: null };
  let timer = 0;
  const search = async ({ kind }) => {
    state.kind = kind;
    await load([]);
  };
  const all = () => {
    chosen = null;
    return load([]);
  };
  function draw() {
    const { rows, next, cursors, kind, problem } = state;
    const empty = problem ?? nothing(live.stale, rows, 'Nothing yet.');
    const shown = rows ?? [];
    const above = cursors.length * ROWS;
    const pager = h('div', { class: 'buttons pager' },
      button('Newer', () => load(cursors.slice(0, -1)), { disabled: cursors.length === 0 }),
      h('span', { class: 'quiet' }, shown.length > 0 ? `${above + 1} to ${above + shown.length}` : ''),
      button('Older', () => load([...cursors, next]), { disabled: !next }));
    const options = KINDS.map(([value, words]) => [value, words, value === kind]);
    show(root, page('Defender events', 'What Defenders have told, each event once. Settings of retention say how many are kept.',
      card('Events', {},
        chosen && h('p', { class: 'buttons' }, h('span', {}, 'Only those of ', h('strong', {}, chosen.name)), button('Show those of all', all, { kind: 'small' })),
        form('Search', search, h('div', { class: 'filter' }, field('Kind', 'kind', { options })), { kind: 'plain' }),
        table('Events', COLUMNS, shown.map(row), empty), pager)));
  }
  async function load(cursors) {
    clearTimeout(timer);
    const { kind } = state;
    const wanted = [['kind', kind], ['defender', chosen?.id]].filter(([, value]) => value).map(([name, value]) => `&${name}=${part(value)}`);
    try {
      const found = await list(`/defenders/events?cursor=${part(cursors.at(-1) ?? 'first')}${wanted.join('')}`, ROWS);
      if (kind !== state.kind) return;
      Object.assign(state, { rows: found.rows, next: found.next, cursors, problem: null });
    } catch (error) {
      state.problem = error.message;
    }
    if (!root.isConnected) return;
    draw();
    again();
  }
  // Whoever reads an older page is not disturbed.
  function again() {
    clearTimeout(timer);
    const look = () => (document.hidden || live.stale || state.cursors.length > 0 ? again() : load([]));
    timer = setTimeout(look, PACE);
  }
  draw();
  load([]);
  return { draw, load: () => load(state.cursors), close: () => clearTimeout(timer) };
}
