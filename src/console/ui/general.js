// Manage > System > General: what this Console is.

import { get } from './api.js';
import { h, show } from './dom.js';
import { live } from './live.js';
import { card, page } from './parts.js';

function facts(values) {
  return h('dl', { class: 'facts' }, values.map(([name, value]) => [h('dt', {}, name), h('dd', {}, value)]));
}

export function open(root) {
  let system = {};
  function draw() {
    const { status } = live;
    const unknown = live.stale ? 'unknown: no PRIMARY answers' : '–';
    const known = [
      ['Version', system.version ?? status?.version ?? unknown],
      ['This node', status?.name ?? unknown],
      ['Cluster', status?.cluster ?? unknown],
      ['High availability', system.haEnabled === false ? 'off' : 'on'],
    ];
    show(root, page('General', null, card('This Console', {}, facts(known))));
  }
  async function load() {
    try {
      system = await get('/settings/system');
    } catch {
      // The page shows what is known.
    }
    draw();
  }
  draw();
  load();
  return { draw, load };
}
