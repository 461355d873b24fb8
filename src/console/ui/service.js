// Manage > System > Service: the program beside the Console, what it says, and the buttons that end and start it.

import { get, post } from './api.js';
import { h, show } from './dom.js';
import { live } from './live.js';
import { button, card, confirm, page, toast, when } from './parts.js';
import { count, nothing, time } from './words.js';

// Milliseconds between two looks while the page is open.
const PACE = 1_000;
// Lines of its log that are shown.
const LINES = 300;
const READERS = ['admin', 'auditor'];
// How it stands: the kind of its badge, and what the state means.
const STATES = {
  ready: ['good', 'clients reach it'],
  starting: ['busy', 'is not ready yet'],
  waiting: ['busy', 'is started again after a pause'],
  stopping: ['busy', 'is asked to end'],
  killing: ['bad', 'is ended by force'],
  stopped: ['asking', 'does not run'],
};

function facts(report) {
  const [kind, words] = STATES[report.state] ?? ['busy', ''];
  const held = report.held && 'An administrator stopped it. It stays so until it is started, or another member takes over.';
  const known = [
    ['State', [h('span', { class: `badge ${kind}` }, report.state), ` ${words}, since `, when(report.since_ms / 1000)]],
    report.problem && ['Problem', h('span', { class: 'problem' }, report.problem)],
    held && ['Held', held],
    ['Command', h('span', { class: 'mono' }, report.command.join(' '))],
    ['Process', report.pid ?? 'none'],
    ['Folder', h('span', { class: 'mono' }, report.folder)],
    ['Ports', report.ports.length > 0 ? `${report.ports.join(', ')} (outside:inside)` : 'none'],
    ['Started again', `${count(report.restarts, 'time')} by this node, because it had failed`],
    report.ended && ['Last end', report.ended],
  ];
  return h('dl', { class: 'facts', id: 'service' }, known.filter(Boolean).map(([name, value]) => [h('dt', {}, name), h('dd', {}, value)]));
}

export function open(root, { user, may }) {
  const reads = READERS.includes(user.role);
  const state = { report: null, lines: [], problem: null, refused: null };
  let timer = 0;
  const act = (action, done) => async () => {
    state.report = await post(`/service/${action}`, {});
    toast(done);
    draw();
  };
  // What needs no question; an error is shown beside the buttons until the next try.
  const atOnce = (work) => async () => {
    state.refused = null;
    try {
      await work();
    } catch (error) {
      state.refused = error.message;
      draw();
    }
  };
  const asked = (title, text, label, work) => () => confirm(title, h('p', {}, text), label, work, { kind: 'danger' });
  const end = asked('Stop the service?', 'Its clients lose their connections, and its ports are closed until it is started again. The Console goes on.',
    'Stop', act('stop', 'The service is stopped'));
  const restart = asked('Restart the service?', 'Its clients lose their connections.', 'Restart', act('restart', 'The service is started again'));
  function buttons({ held, state: standing }) {
    const off = held || standing === 'stopped';
    return h('div', { class: 'buttons' },
      button('Start', atOnce(act('start', 'The service is started')), { disabled: !off }),
      button('Stop', end, { disabled: off }),
      button('Restart', restart, { disabled: off }));
  }
  function draw() {
    const { report, lines, problem, refused } = state;
    const log = root.querySelector('.log');
    // Who reads further up stays there.
    const follows = !log || log.scrollTop + log.clientHeight >= log.scrollHeight - 4;
    const known = report && !live.stale && !problem;
    const text = lines.map((line) => `${time(line.time_ms / 1000)} ${line.text}`).join('\n');
    show(root, page('Service', 'The program that runs on the PRIMARY alone, beside the Console.',
      card('How it is', {},
        known ? facts(report) : h('p', { class: 'empty' }, problem ?? nothing(live.stale, false)),
        may && known && buttons(report),
        h('p', { class: 'problem', role: 'alert' }, refused)),
      reads && card('What it says', {},
        h('pre', { class: 'log', tabindex: 0, 'aria-label': 'What the service says' }, (known && text) || nothing(live.stale, known, 'Nothing yet.')))));
    const drawn = root.querySelector('.log');
    if (drawn && follows) drawn.scrollTop = drawn.scrollHeight;
  }
  async function load() {
    clearTimeout(timer);
    try {
      state.report = await get('/service');
      // Whole each time: another node, or another run of its daemon, counts its lines anew.
      if (reads) state.lines = await get(`/service/logs?lines=${LINES}`);
      state.problem = null;
    } catch (error) {
      state.problem = error.message;
    }
    if (!root.isConnected) return;
    draw();
    timer = setTimeout(again, PACE);
  }
  function again() {
    clearTimeout(timer);
    if (document.hidden || live.stale) timer = setTimeout(again, PACE);
    else load();
  }
  draw();
  load();
  return { draw, load, close: () => clearTimeout(timer) };
}
